"""Problems, prompts and rewards: what a task is, and one file per task."""
