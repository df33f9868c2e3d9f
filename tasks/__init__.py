"""Problems, prompts and verifiable rewards: what a task is, and one file for each."""
