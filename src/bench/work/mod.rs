//! The workloads of the classic comparisons: `vmm bench-work NAME`, run natively, in a container, and as PID 1 of a guest.
