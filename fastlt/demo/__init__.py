"""`fastlt demo` and the images that it draws."""
