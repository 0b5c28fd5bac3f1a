"""A student taught by its teacher: the job, its processes, and the training itself."""
