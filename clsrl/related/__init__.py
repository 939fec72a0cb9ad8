"""Methods of other papers that train on few images with rewards checked by rules, one file each."""
