"""Training one model: device, optimizer, one optimizer step at a time, moving average. Never says "sft" or "ppo"."""
