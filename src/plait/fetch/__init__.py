"""Files from the hub and from URLs: resumed, checked, linked where they are here already."""
