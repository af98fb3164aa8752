"""The commands of the recipes, one file each; :class:`~quartz_plugin.lightning.trainer.QuartzTrainer` has them all."""
