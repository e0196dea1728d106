# Turns the index settings into gcloud commands, one a line:
#   tai-state firestore indexes | jq -r --arg database state -f deploy/gcloud.jq | sh -ex
def at: "--database='\($database)' --collection-group='\(.collectionGroup)'";

(.indexes[] |
  "gcloud firestore indexes composite create \(at) --query-scope=\(.queryScope | ascii_downcase)"
  + ([.fields[] | " --field-config=field-path=\(.fieldPath),order=\(.order | ascii_downcase)"] | add)),
(.fieldOverrides[] |
  "gcloud firestore indexes fields update \(.fieldPath) \(at)"
  + (if .indexes == [] then " --disable-indexes"
     else ([.indexes[] | " --index=order=\(.order | ascii_downcase)"] | add) end)),
(.fieldOverrides[] | select(.ttl) |
  "gcloud firestore fields ttls update \(.fieldPath) \(at) --enable-ttl")
