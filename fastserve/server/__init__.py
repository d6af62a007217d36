"""The API server: HTTP in, jobs to the engine's process, answers out as they grow."""
