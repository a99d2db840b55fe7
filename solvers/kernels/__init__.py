"""The finish of a step in one pass over memory: the contract, and a kernel for each kind of device that keeps it."""
