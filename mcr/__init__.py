"""MCR: a multicast relay for Linux, accelerated with XDP and io_uring and controlled from Python."""

__version__ = "0.1.0"
