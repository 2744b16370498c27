"""The analyses of the papers, as functions over scores, probabilities and features.

`ANALYSES` names those that `hrvlm analyse` runs: functions of plain keyword arguments that return
the lines to print.
"""

# name -> module:function, what it shows. A new analysis is one line here.
ANALYSES: dict[str, tuple[str, str]] = {
  'attention': ('attention:run', 'share of cross-attention on the global view (Pheye, figure 4)'),
  'boxes': ('boxes:run', 'images and boxes of region records (PS3, table 9)'),
  'cost': ('cost:run', 'operations and memory of one answer; the numbers of Pheye, section 2.2'),
  'curve': ('curves:run', 'accuracy against crops, tokens, resolution (PS3, figure 9)'),
  'pca': ('pca:run', 'visual tokens as colours (PS3, figure 14)'),
  'recall': ('recall:run', 'how many patches of regions are selected (PS3, table 7)'),
  'resolution': ('resolution:run', 'resolution that questions need (PS3, figure 10)'),
  'sizes': ('sizes:run', 'accuracy by the size of what is asked about (Pheye, table 2)'),
}
