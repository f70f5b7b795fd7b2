"""What HTML pages are made of.

frame.py    document, style, lists, cards, tables
charts.py   plots as inline SVG
"""
