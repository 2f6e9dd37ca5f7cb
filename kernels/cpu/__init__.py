"""What kernels run on a CPU where plain torch would take many small operations."""
