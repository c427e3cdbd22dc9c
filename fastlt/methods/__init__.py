"""The methods: what the training loop trains, one file each."""
