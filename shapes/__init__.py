"""How show_shapes records and draws tensor shapes, and checked shape comments."""
