"""Fine-tuning: `run` trains, `trainer` builds what it trains with, `checkpoints` and `run_folder` keep a killed run alive."""
