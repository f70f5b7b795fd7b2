"""The building blocks of HTML pages.

frame.py    document, style, lists, cards, tables
charts.py   plots as inline SVG
"""
