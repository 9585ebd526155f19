"""The worker's thread, which runs jobs on the engine, and the frames for viewers of a job."""
