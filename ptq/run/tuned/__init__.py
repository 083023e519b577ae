"""What a run does where a step learns on the finished network: its samples, what it goes on from, and what passes afterwards."""
