"""OpenAI's fine-tuning API over the main job: files, jobs, a queue, checkpoints, and chat with what was trained.

A job is a recipe and a run folder, so its state is what the folder says: a server that is killed finds its jobs again.
"""
