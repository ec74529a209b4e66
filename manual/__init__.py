"""What is made while the documentation site is built (`make docs`); mkdocs.yml names the files."""
