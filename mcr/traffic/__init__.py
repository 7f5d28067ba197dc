"""The test source and the test sink of MCR: known packets out, an exact account of what came back.

They speak through ordinary sockets only. This package must never use the relay's own code for packets, so
that it can judge the relay.
"""
