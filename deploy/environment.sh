# shellcheck shell=bash
# Sourced by the scripts beside it: lets mpirun start more ranks than cores, also as root in a container.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_btl_vader_single_copy_mechanism=none
# Time to drain when mpirun itself is told to stop. Open MPI 4.1 waits this long before it passes SIGTERM on, and again
# before SIGKILL; it then exits 1. It waits as long once or twice when a rank exits with another code than 0, so a bad
# flag ends after up to a minute. SIGTERM to rank 0 (the pid in --ready-file) has no such wait and exits 0.
export OMPI_MCA_odls_base_sigkill_timeout=30
