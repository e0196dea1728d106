# What stands in firestore.indexes.json, as it is needed by main.tf. No resource stands here, so that
# deploy/check can look at the values without a provider.

locals {
  settings = jsondecode(file("${path.module}/../firestore.indexes.json"))

  # Composite indexes, by a name made of what they are: two of one collection are told apart, and
  # a change of the file's order changes nothing.
  composites = {
    for index in local.settings.indexes :
    join(",", concat(
      ["${var.prefix}${index.collectionGroup}", index.queryScope],
      [for field in index.fields : "${field.fieldPath} ${field.order}"],
      )) => {
      collection  = "${var.prefix}${index.collectionGroup}"
      query_scope = index.queryScope
      fields      = index.fields
    }
  }

  # Settings of single fields: which indexes a field keeps (none, mostly), and TTL.
  fields = {
    for field in local.settings.fieldOverrides :
    "${var.prefix}${field.collectionGroup}.${field.fieldPath}" => {
      collection = "${var.prefix}${field.collectionGroup}"
      field      = field.fieldPath
      indexes    = field.indexes
      ttl        = try(field.ttl, false)
    }
  }
}
