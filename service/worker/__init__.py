"""The thread that owns scheduler and engine, and what it hands out of the jobs that run."""
