"""The thread that runs jobs on the engine, and what it gives the viewers of a job."""
