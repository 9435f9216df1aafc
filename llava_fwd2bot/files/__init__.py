"""Files that people bring along: texts, images, folders of them."""
