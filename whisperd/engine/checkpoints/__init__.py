"""What a model directory holds, in either format."""
