"""Fine-tuning: `run` trains, `trainer` builds its trainer, `checkpoints` and `run_folder` let a killed run continue."""
