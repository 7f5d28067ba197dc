"""The tests of MCR. A package so that tests can import the laboratory as `tests.netns.lab`."""
