"""The worker's thread, which runs jobs on the engine, and the thread for autoencoder tasks."""
