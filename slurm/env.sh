# Source this in a batch script before mpirun or srun: how ranks and threads wait for each other.
# Threads at a barrier give the core away instead of spinning on it; so do MPI ranks.
export OMP_WAIT_POLICY=passive
export OMPI_MCA_mpi_yield_when_idle=1
# srun needs PMIx with Open MPI; without it srun starts N programs of one rank each, which pmpd refuses.
export SLURM_MPI_TYPE=pmix
