# Source this in a batch script before srun or mpirun. What is set already stays: a site or a user
# knows better. Nothing here chooses a network; that is left to the site's MPI.
# SPDX-License-Identifier: Apache-2.0

# Threads of a rank: what Slurm gave it. srun of 22.05 and later does not take --cpus-per-task over
# from sbatch by itself, and a rank would get one CPU.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
fi
# Threads that wait at a barrier give the core away instead of spinning on it; so do ranks that wait
# for a message. Ranks that share cores need it (an all-reduce took 10 ms instead of 0.2); with a
# core for each it costs some microseconds.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
# Open MPI binds each rank to one core, and its threads with it. Slurm has confined the rank already.
export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}
# srun wires ranks together through PMIx; Open MPI as Debian and Ubuntu build it knows nothing else.
# For a site whose MPI wants another: SLURM_MPI_TYPE=pmi2 (or cray_shasta) before sbatch.
export SLURM_MPI_TYPE=${SLURM_MPI_TYPE:-pmix}

# mpirun only. A host or link that is silent for 3 + 7 x 3 s ends the job (else it waits for ever).
# pmpd itself gives a silent host up earlier, so its message, which names the rank, comes first.
export OMPI_MCA_oob_tcp_keepalive_time=${OMPI_MCA_oob_tcp_keepalive_time:-3}
export OMPI_MCA_oob_tcp_keepalive_intvl=${OMPI_MCA_oob_tcp_keepalive_intvl:-3}
export OMPI_MCA_oob_tcp_keepalive_probes=${OMPI_MCA_oob_tcp_keepalive_probes:-7}
# When mpirun ends its ranks it waits so many seconds before SIGTERM and again before SIGKILL, also
# when all have gone: enough to finish a pass, not so much that every failure takes long.
export OMPI_MCA_odls_base_sigkill_timeout=${OMPI_MCA_odls_base_sigkill_timeout:-3}
