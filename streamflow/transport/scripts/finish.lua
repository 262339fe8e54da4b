-- job, index, stage, entry, worker or '', then the result, or code, message and service of a failure -> 0 or 1
local _, id, index, stage, entry, worker, result, message, service = unpack(ARGV)
go_on_when_full()
if place(id, index) ~= stage .. ':' .. entry then
  discard(stream_key(stage, C.revision), entry)
  return made_before(id, index, stage, entry, worker)
end
-- Not when the reaper comes by: how a job ends must not depend on that.
if NOW >= tonumber(redis.call('HGET', job_key(id), 'deadline')) then
  end_late(id)
  return 0
end
note_move(id, index, stage, entry, worker)
if message then
  end_image(id, index, 'error')
  end_job(id, 'error', 'cancelled', {result, message, service})
  return 1
end
measure(id, index, true)
redis.call('SET', result_key(id, index), result)
redis.call('HSET', job_key(id), 'b' .. index, #result)
local left = end_image(id, index, 'done', #result)
if left == 0 then
  end_job(id, 'images', 'cancelled')
else
  wake(id)
  release()
end
return 1
