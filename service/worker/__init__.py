"""The thread that runs jobs on the engine, and what it gives those who follow a job."""
