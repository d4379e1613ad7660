"""The command `flowmo`: what the pipelines do, for files and folders."""
