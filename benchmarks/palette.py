"""The colours of all figures. negmine is blue. All colours can be told apart, also in black and white."""

BLUE, RED, YELLOW, GREEN, PURPLE, GREY = "#1b6ca8", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#8a8d91"
COLOURS = [BLUE, RED, YELLOW, GREEN, PURPLE, GREY, "#4a4e69", "#b08968", "#2a9d8f"]
