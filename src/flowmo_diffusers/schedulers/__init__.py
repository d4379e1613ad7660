"""When: the times at which the model is asked, and the steps between them."""
