"""One script per post: `run(config, workdir) -> Result`. The only place where all layers meet."""
