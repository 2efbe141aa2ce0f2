"""The learning recipe: optimizer, schedule, and the train and eval steps. Nothing here needs Ray."""
