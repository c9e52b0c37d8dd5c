"""A small model of the DeepSeek-V3.2 architecture that calls tools: its tasks, training, export and evaluation."""
