# Source this in a batch script before srun or mpirun. What is set already stays: a site or a user
# knows better. Nothing here chooses a network; that is left to the site's MPI.
# shellcheck shell=sh
# SPDX-License-Identifier: Apache-2.0

# Threads of a rank: what Slurm gave it. srun of 22.05 and later does not take --cpus-per-task over
# from sbatch by itself, and a rank would get one CPU.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"
    export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
fi
# Threads that wait at a barrier spin for a moment, then sleep. Where ranks share cores they must sleep
# at once (an all-reduce took 10 ms instead of 0.2); where every rank has its own cores that would cost 9
# us for each parallel region, 1.5 ms of a decode step of 24 layers. On nodes of several NUMA domains
# OMP_PROC_BIND=close keeps threads near the weights that they first touched.
_pmpd_tasks="${SLURM_TASKS_PER_NODE:-}"
_pmpd_tasks="${_pmpd_tasks%%[!0-9]*}"
if [ "$((${_pmpd_tasks:-1} * ${OMP_NUM_THREADS:-1}))" -gt "${SLURM_CPUS_ON_NODE:-0}" ]; then
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
fi
unset _pmpd_tasks
# So do ranks that wait for a message.
export OMPI_MCA_mpi_yield_when_idle="${OMPI_MCA_mpi_yield_when_idle:-1}"
# Open MPI binds each rank to one core, and its threads with it. Slurm has confined the rank already.
export OMPI_MCA_hwloc_base_binding_policy="${OMPI_MCA_hwloc_base_binding_policy:-none}"
# srun wires ranks together through PMIx; Open MPI as Debian and Ubuntu build it knows nothing else.
# For a site whose MPI wants another: SLURM_MPI_TYPE=pmi2 (or cray_shasta) before sbatch.
export SLURM_MPI_TYPE="${SLURM_MPI_TYPE:-pmix}"
# The barrier of MPI_Init. Slurm mixes two algorithms by default, and on a busy machine (22.05, Open MPI
# 4.1.4) 9 of 2400 starts died in MPI_Init of a message that came too early; none of 2000 with the tree.
export SLURM_PMIX_FENCE="${SLURM_PMIX_FENCE:-tree}"

# mpirun only. It notices a host that has fallen silent (a cut cable) after 21 to 24 s and ends the
# job; without these it waits for ever. The ranks' own lifeline (dist/lifeline.h) gives a silent host
# up after 15 to 20 s, which names the rank, and ends the ranks 10 s later: mpirun must come in
# between, or it waits for the answer of its daemon there.
export OMPI_MCA_oob_tcp_keepalive_time="${OMPI_MCA_oob_tcp_keepalive_time:-3}"
export OMPI_MCA_oob_tcp_keepalive_intvl="${OMPI_MCA_oob_tcp_keepalive_intvl:-3}"
export OMPI_MCA_oob_tcp_keepalive_probes="${OMPI_MCA_oob_tcp_keepalive_probes:-7}"
# When mpirun ends its ranks it waits so many seconds before SIGTERM and again before SIGKILL, also
# when all have gone: enough to finish a pass, not so much that every failure takes long.
export OMPI_MCA_odls_base_sigkill_timeout="${OMPI_MCA_odls_base_sigkill_timeout:-3}"
