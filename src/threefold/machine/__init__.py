"""What this machine does best, found out rather than assumed: matrix kernels, memory, measured rates."""
