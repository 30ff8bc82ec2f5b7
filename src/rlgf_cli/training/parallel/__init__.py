"""Several processes: data parallel (ddp) and sharded (fsdp)."""
