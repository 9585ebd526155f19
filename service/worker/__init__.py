"""The thread that runs jobs on the engine, and the frames it gives to a job's viewers."""
