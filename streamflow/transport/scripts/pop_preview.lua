-- -> the oldest entry of the preview stream
local key = C.prefix .. 'preview'
local entry = redis.call('XRANGE', key, '-', '+', 'COUNT', 1)[1]
if entry then redis.call('XDEL', key, entry[1]) end
return entry
