"""Vision and vision-language backbones."""
