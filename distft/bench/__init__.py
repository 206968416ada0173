"""What a run costs, measured: time, memory, traffic between processes, waits for the accelerator."""
