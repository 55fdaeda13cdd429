"""What a detector's own code imports: one file a framework. Importing one pulls in that framework and nothing else."""
