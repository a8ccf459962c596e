# Source this in a batch script before mpirun or srun: how ranks and threads wait for each other.
# Threads at a barrier give the core away instead of spinning on it; so do MPI ranks.
export OMP_WAIT_POLICY=passive
export OMPI_MCA_mpi_yield_when_idle=1
# srun needs PMIx with Open MPI; without it srun starts N programs of one rank each, which pmpd refuses.
export SLURM_MPI_TYPE=pmix
# mpirun notices a host that has fallen silent (a cut cable) after 21 to 24 s and ends the job; without these it waits
# for ever. The ranks' own lifeline (dist/lifeline.h) gives a silent host up after 15 to 20 s, which names the rank, and
# ends the ranks 10 s later: mpirun must come in between, or it waits for the answer of its daemon there.
export OMPI_MCA_oob_tcp_keepalive_time=3 OMPI_MCA_oob_tcp_keepalive_intvl=3 OMPI_MCA_oob_tcp_keepalive_probes=7
