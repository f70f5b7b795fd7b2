"""The colours of every picture: ours is blue; the others stand apart from it and from each other, in print too."""

BLUE, RED, YELLOW, GREEN, PURPLE, GREY = "#1b6ca8", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#8a8d91"
COLOURS = [BLUE, RED, YELLOW, GREEN, PURPLE, GREY, "#4a4e69", "#b08968", "#2a9d8f"]
