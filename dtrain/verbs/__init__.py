"""What can be typed after `dtrain`. A verb is a file here; nothing lists them."""
