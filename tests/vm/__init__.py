"""MCR on the kernels and NIC drivers that Debian's users have, in virtual machines: `make test-vm`."""
